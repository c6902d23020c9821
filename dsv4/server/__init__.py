"""An HTTP server that speaks OpenAI's protocol. Its libraries (the extra `server`) load when a server starts."""
