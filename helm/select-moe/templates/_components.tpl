{{/*
Which components a release has, as a JSON mapping of name to true: what is not there needs no account and no policy.
The name is the label app.kubernetes.io/component of its pods.
*/}}
{{- define "select-moe.components" -}}
{{- $pipeline := .Values.pipeline.enabled }}
{{- $ownAccount := and $pipeline .Values.pipeline.serviceAccount.create .Values.rbac.create }}
{{- $all := dict
  "mlflow" .Values.mlflow.enabled
  "seaweedfs" .Values.objectStorage.seaweedfs.enabled
  "retention" (and .Values.mlflow.enabled .Values.mlflow.gc.enabled)
  "secrets" (include "select-moe.makesSecrets" . | eq "true")
  "bucket" .Values.objectStorage.createBucket
  "upload" (and $pipeline .Values.pipeline.upload.enabled)
  "run" (and $pipeline .Values.pipeline.run.enabled)
  "test-s3" .Values.tests.enabled
  "test-mlflow" .Values.tests.enabled
  "test-kfp" (and .Values.tests.enabled $pipeline)
  "test-rights" (and .Values.tests.enabled $ownAccount)
}}
{{- $here := dict }}
{{- range $name, $there := $all }}{{ if $there }}{{ $_ := set $here $name true }}{{ end }}{{ end }}
{{- toJson $here }}
{{- end }}

{{/* Those of a list that a release has, separated by blanks. Takes (dict "root" $ "components" LIST). */}}
{{- define "select-moe.present" -}}
{{- $here := include "select-moe.components" .root | fromJson }}
{{- $found := list }}
{{- range .components }}{{ if hasKey $here . }}{{ $found = append $found . }}{{ end }}{{ end }}
{{- join " " $found }}
{{- end }}
