"""BERT's pretraining: model, objective, metrics."""
