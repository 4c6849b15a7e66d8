"""Judge models on OpenAI-compatible servers: rubrics, replies, a scorer and a comparator."""
