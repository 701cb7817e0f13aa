"""Meta-steps: inner steps on support samples, the outer gradient from query samples."""
