"""Will it fit, how long will it take, what should one choose. Pure Python on `layout/`, but for two files."""
