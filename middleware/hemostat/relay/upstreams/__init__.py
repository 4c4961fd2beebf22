"""The engines behind one relay: their connections, which of them are healthy, and which one gets a request.

connection   one connection, which carries one request at a time
pool         the connections to one engine, and the requests that wait for one
health       when an engine gets no requests, and when again (pure)
comparison   which engine fails more requests than the others (pure)
balancer     which engine gets a request (pure)
group        one engine with its address, pool and health: `Engine`; all of them: `Upstreams`
checker      asks every engine for GET /health
resolver     the engines behind one name, by DNS
settings     a relay's settings of the engines
"""
