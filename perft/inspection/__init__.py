"""What an adapter is and does: sizes, routing on given prompts, and plots of both (`perft inspect`)."""
