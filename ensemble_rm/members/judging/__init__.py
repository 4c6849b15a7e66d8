"""Judge models behind an OpenAI-compatible chat endpoint: rubrics, replies read, both orders."""
