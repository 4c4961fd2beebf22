"""The live gate: may a candidate replace what serves? It is asked about live traffic, in the background, and no client
sees it.

keeper      begins and ends gates, takes scored records, and says what the verdict is
measuring   measures one record at the candidate: the excess of each question
candidate   the candidate's server: whether it answers, and is the same as before
stable      the engine that has answered, and the reference: the other side of each comparison
stored      what outlasts the control process
report      the verdict as JSON and in words
"""
