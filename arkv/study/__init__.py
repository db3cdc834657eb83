"""What a policy does to pictures: accuracy, attention lost, what a cache holds, and figures of it."""
