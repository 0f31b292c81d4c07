"""What a recipe may say of each room's work. Nothing here imports torch, so that arguments are checked at once."""
