"""Knowledge neurons."""
