"""What a backbone sees in some images, as pictures with their numbers."""
