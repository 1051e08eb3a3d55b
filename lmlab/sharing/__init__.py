"""What leaves lmlab: models on the Hugging Face hub, with a card, and in the forms that other tools read."""
