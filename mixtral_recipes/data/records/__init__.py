"""Records of files: opened, parsed, recognised."""
