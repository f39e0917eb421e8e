"""Fine-tuning on SQuAD."""
