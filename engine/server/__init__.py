"""The server: OpenAI's HTTP API and our own over one EngineLoop. Needs the extra `serve`; nothing here is imported by kvtier itself."""
