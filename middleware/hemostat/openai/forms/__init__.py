"""The forms of request and response that can be scored: a module for each (`protocol.Format`), all in `table`.

chat         the form of `/v1/chat/completions`
completions  the form of `/v1/completions`, checked against vLLM 0.32 (`entrypoints/openai/completion`)
messages     the form of `/v1/messages`, which is Anthropic's
protocol     the interface that each form implements
responses    the form of `/v1/responses`, checked against vLLM 0.32 (`entrypoints/openai/responses`)
shared       the common parts of the requests of chat and completions
table        the one table of the forms that are implemented
tapped       the common parts of the forms whose responses are passed on as they are
"""
