"""A prompt and its target as one checked, teacher-forced pass with scores."""
