"""The accuracy of the tasks on held-out sets, and the training of the sentiment probe."""
