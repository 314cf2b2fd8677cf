"""Attribution by the scores of prompts whose features are masked."""
