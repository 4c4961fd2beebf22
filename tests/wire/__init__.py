"""The wire layer: server-sent events, OpenAI bodies, sampling, the interceptor."""
