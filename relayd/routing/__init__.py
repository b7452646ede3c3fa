"""What an operator's route decides about each client, and how it is asked."""
