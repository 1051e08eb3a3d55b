"""What leaves lmlab: trained models in the forms that other tools read."""
