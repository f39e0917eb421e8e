"""From raw text to the prepared folders of BERT's pretraining."""
