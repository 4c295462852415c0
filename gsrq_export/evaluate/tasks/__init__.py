"""Long-context tasks in the manner of RULER (Hsieh et al., arXiv 2404.06654), planted in held-out text of one's own."""
