"""Models for others: on the Hugging Face hub, with a card, and in the forms that other tools read."""
