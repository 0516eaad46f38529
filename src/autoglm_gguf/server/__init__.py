"""A model behind OpenAI's API, a WebSocket and a page; see `autoglm_gguf.server.app`."""
