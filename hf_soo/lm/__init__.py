"""Language models over bytes, or over the tokens of a tokenizer: text in windows, a small GPT or BERT."""
