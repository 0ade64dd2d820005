"""What processes of one node share, and how it goes when they have gone. Imports nothing of ours."""
