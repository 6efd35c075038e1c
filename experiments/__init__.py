"""What an experiment is: its options, its folders, and what is made of them."""
