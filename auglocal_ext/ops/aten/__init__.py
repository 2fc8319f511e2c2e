"""Every op by torch's own kernels. A module here is imported when its op first runs."""
