"""Every op in Triton. A module here is imported when its op first runs, and Triton with it."""
