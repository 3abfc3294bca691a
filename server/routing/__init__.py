"""Which of many servers a request goes to."""
