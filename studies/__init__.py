"""Studies: questions that were asked once of the method or of the model that ships, each with its command.

They stand beside the package and are not installed. Their results are in docs/.
"""
