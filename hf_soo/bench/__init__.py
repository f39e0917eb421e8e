"""What a step costs, measured."""
