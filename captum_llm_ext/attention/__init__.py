"""Attribution by the attention that target tokens pay to the prompt."""
