"""Many adapters on one base, answering many clients at once: an engine without HTTP, and OpenAI's API around it."""
