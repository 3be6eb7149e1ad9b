"""Layer 3: reports, figures, pages, comparison and analysis."""
