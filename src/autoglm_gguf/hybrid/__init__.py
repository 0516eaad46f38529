"""This device first, a cloud when a policy says so.

`policy` judges answers, `wire` speaks OpenAI's chat completions in bytes, `cloud` sends them,
`breaker` and `cache` keep from asking in vain, `routing` decides for one request, `client` carries
it out.
"""
