"""The server: OpenAI's HTTP API and our own over one EngineLoop. Needs the extra `serve`; kvtier itself never imports it."""
