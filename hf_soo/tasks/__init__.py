"""Training tasks: BERT pretraining (model, text, pairs, masks) and fine-tuning. `import hf_soo` does not load them."""
