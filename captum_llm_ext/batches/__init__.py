"""Many prompts: a file of requests in, a file of results out, resumed where it stopped."""
