"""This device first, a cloud when a policy says so.

`policy` judges answers, `wire` speaks OpenAI's chat completions in bytes, `cloud` sends them,
`breaker` and `cache` keep from asking in vain, `local` says what the device must offer, `routing`
decides for one request, `client` carries it out.
"""
