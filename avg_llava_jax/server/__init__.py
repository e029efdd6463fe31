"""The engine over HTTP, as OpenAI's chat completions: reading requests, writing replies, and a page to look at."""
