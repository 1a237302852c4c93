"""What keeps a run from going wrong unnoticed."""
