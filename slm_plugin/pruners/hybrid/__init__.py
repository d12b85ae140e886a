"""What a planner of depth and width together knows about time and memory."""
