"""Options that commands share, each declared once, and the mechanism that hands them over in groups."""
