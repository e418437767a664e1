"""`python -m selectmoe` is `selectmoe`."""

from selectmoe.cli import main
import sys
sys.exit(main())
