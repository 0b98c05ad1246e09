"""What a model knows, measured with error bars: exams, bits per byte, comparisons."""
