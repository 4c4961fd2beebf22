"""OpenAI's chat and completions API as vLLM implements it, without IO.

complexity        finds out if a body can be read in a few milliseconds, in one pass over its bytes
conversation_key  finds out which conversation a request belongs to from a few of its bytes
credentials       reads what names a client in a header, however it is spelled
errors            errors in OpenAI's shape
forms             the forms of request and response that can be scored
json_splice       editing a JSON object's bytes in place
kinds             the kind of traffic that a request belongs to
logprobs          the log-probabilities in vLLM's responses
model_name        the name of the model in what the server sends
observing         responses that are passed on as they are
parameters        the parameters of a request, whatever its form
reading           reads a client's body into a `Request`
recompressing     responses that the upstream compresses without being asked to
repetition        answers that repeat themselves to their end
requests          a client's request, whatever its form: the structures that its body is read into
restrictions      finds out if a grammar restricts the tokens of a request, as far as its body shows
routes            the one table of the routes that vLLM serves, with the forms of their requests, and those that the
                  relay refuses to clients
sse               server-sent events, without IO
stripping         responses with `choices` on their way to the client
tokens            the tokens of one response, choice by choice, and why they could not be recorded
"""
