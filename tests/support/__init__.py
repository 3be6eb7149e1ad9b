"""What several test files share: models and trainers, two processes, and what rounding may change."""
