"""The trained agent in use: answers with their sources, in Python, over HTTP and by MCP, and the bundle it is shared as."""
