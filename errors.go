package aegis

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
)

// This file has the Error, its form on the wire, and the codes of transient failures.

// An Error is the error that the functions of aegis return, whether the failure is local or in a service that was called. Some
// functions return several Errors that are joined as by [errors.Join], and some return the error of a function that they call.
//
// Code is the code of one of the sentinels, or a handler's own, by convention in upper snake case. Message is a text for
// people. Source is the service that reports the error, or "" for this service. Details has further facts by name, such as the
// correlation id of a call that got no answer, in Details["correlation_id"]. NotRun is set if the request certainly did not
// reach a handler, so that it can be sent again without harm. Cause is the error that led to this one: the error that the
// service Source got from another service, or the error of an earlier attempt. It is nil if there is none.
//
// [errors.Is] compares the codes of an Error and of all its Causes, so that errors.Is(err, aegis.ErrNotFound) holds both in the
// service that returned the error and in its caller. An Error with the code DEADLINE_EXCEEDED also matches
// [context.DeadlineExceeded], and an Error with the code CANCELED also matches [context.Canceled].
type Error struct {
	Code    string            `json:"code"`
	Message string            `json:"message,omitempty"`
	Source  string            `json:"source,omitempty"`
	Details map[string]string `json:"details,omitempty"`
	NotRun  bool              `json:"not_run,omitempty"`
	Cause   *Error            `json:"cause,omitempty"`
}

// The sentinels are the errors that aegis itself returns. Use [errors.Is] to compare an error with one of them.
var (
	ErrInvalid       = &Error{Code: "INVALID_ARGUMENT"}  // a name, an option or a payload is not valid
	ErrNotFound      = &Error{Code: "NOT_FOUND"}         // the requested item does not exist
	ErrNotActive     = &Error{Code: "NOT_ACTIVE"}        // the instance is not the leader
	ErrFenced        = &Error{Code: "FENCED"}            // the instance lost its leadership while the handler ran
	ErrUnavailable   = &Error{Code: "UNAVAILABLE"}       // no instance or no server can be reached
	ErrTimeout       = &Error{Code: "DEADLINE_EXCEEDED"} // no answer came in time, or a command expired
	ErrOverloaded    = &Error{Code: "OVERLOADED"}        // the handler, or a connection of the caller, is at its limit
	ErrUnimplemented = &Error{Code: "UNIMPLEMENTED"}     // the service has no such method, or no such command
	ErrInternal      = &Error{Code: "INTERNAL"}          // a handler returned another error or panicked, or an answer is not valid
	ErrCircuitOpen   = &Error{Code: "CIRCUIT_OPEN"}      // the circuit breaker of the called service is open
	ErrCanceled      = &Error{Code: "CANCELED"}          // ctx, or the command, was cancelled
	ErrClosed        = &Error{Code: "CLOSED"}            // the service was stopped
	ErrDenied        = &Error{Code: "PERMISSION_DENIED"} // the server's permissions do not allow the operation
)

// Error returns the text of the error: the Source, Code and Message of e and of its Causes, without repetitions.
func (e *Error) Error() string {
	var parts []string
	for ; e != nil; e = e.Cause {
		parts = append(parts, e.Source)
		if c := e.Cause; c == nil || c.Code != e.Code || c.Message != e.Message {
			parts = append(parts, e.Code, e.Message)
		}
	}
	return strings.Join(slices.DeleteFunc(parts, func(p string) bool { return p == "" }), ": ")
}

// Is reports whether target is an *Error with the same code, or the error of package context that corresponds to this code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t != nil && t.Code == e.Code || e.Code == ErrTimeout.Code && target == context.DeadlineExceeded ||
		e.Code == ErrCanceled.Code && target == context.Canceled
}

// Unwrap returns Cause, or nil if there is none.
func (e *Error) Unwrap() error {
	if e == nil { // errors.As looks at a nil *Error too, if a handler returns one
		return nil
	}
	return e.Cause.orNil()
}

// orNil returns e as an error, and the nil interface if e is nil.
func (e *Error) orNil() error {
	if e == nil {
		return nil
	}
	return e
}

func newError(kind *Error, format string, args ...any) *Error {
	return &Error{Code: kind.Code, Message: fmt.Sprintf(format, args...)}
}

// notRun sets e.NotRun and returns e.
func notRun(e *Error) *Error {
	e.NotRun = true
	return e
}

// joinErrors is errors.Join, except that it returns a single error as it is.
func joinErrors(errs ...error) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}

// asError returns err as an *Error, nil if err is nil. It is the error that the caller of a handler gets if the handler returns
// err.
func asError(err error) *Error {
	e, ok := errors.AsType[*Error](err)
	switch {
	case err == nil:
		return nil
	case ok && e == nil:
		return newError(ErrInternal, "the handler returned a nil *aegis.Error as an error: return nil itself")
	case !ok && errors.Is(err, context.DeadlineExceeded):
		return newError(ErrTimeout, "%v", err)
	case !ok && errors.Is(err, context.Canceled):
		return newError(ErrCanceled, "%v", err)
	case !ok:
		return newError(ErrInternal, "%v", err)
	}
	out, own := *e, e.Message
	if e.Source != "" { // e came from a service that the handler called
		out.Cause, own = e, ""
	}
	if error(e) != err { // err wraps e: keep the text around it
		out.Message = strings.TrimSuffix(strings.Replace(err.Error(), e.Error(), own, 1), ": ")
	}
	return &out
}

// transientCodes are the codes of failures after which a retry may succeed, if NotRun is set.
var transientCodes = []string{ErrUnavailable.Code, ErrOverloaded.Code, ErrNotActive.Code, ErrCircuitOpen.Code}

// isUnanswered reports whether failure means that a message was sent and got no answer, so that a handler may have run.
func isUnanswered(failure *Error) bool {
	return !failure.NotRun && slices.Contains([]string{ErrUnavailable.Code, ErrTimeout.Code, ErrOverloaded.Code}, failure.Code)
}

// retryable reports whether a retry could succeed. Whether the message may be sent twice is for the caller to know.
func retryable(failure *Error) bool {
	return failure != nil && (isUnanswered(failure) || safeToResend(failure))
}

// safeToResend reports whether failure is transient, and the message certainly did not reach a handler.
func safeToResend(failure *Error) bool {
	return failure.NotRun && slices.Contains(transientCodes, failure.Code)
}

// sentinels has a sentinel for each status, in the manner of nats.go/micro.
var sentinels = map[string]*Error{
	"400": ErrInvalid, "403": ErrDenied, "404": ErrNotFound, "409": ErrFenced, "421": ErrNotActive, "429": ErrOverloaded,
	"499": ErrCanceled, "500": ErrInternal, "501": ErrUnimplemented, "503": ErrUnavailable, "504": ErrTimeout,
}

// statuses has the status for the code of each sentinel. Two of them share that of ErrUnavailable.
var statuses = func() map[string]string {
	all := map[string]string{ErrCircuitOpen.Code: "503", ErrClosed.Code: "503"}
	for status, kind := range sentinels {
		all[kind.Code] = status
	}
	return all
}()

const maxErrorText = 1 << 10 // bytes

// encode returns the error as headers, which any NATS client can read, and as a payload, which has every field of it.
func (e *Error) encode(c Codec) (nats.Header, []byte) {
	status := cmp.Or(statuses[e.Code], "422") // for a handler's own code
	if c != JSON {
		c = MsgPack
	}
	out := *e
	out.Message = cutText(e.Message, len(e.Message))
	data, _ := c.Marshal(&out) // can't fail: strings and booleans only
	return nats.Header{headerErrorCode: {status}, headerErrorText: {cutText(e.Error(), maxErrorText)}}, data
}

// decodeError returns the error in an answer, nil if the answer is a success.
func decodeError(m *nats.Msg) *Error {
	status := m.Header.Get(headerErrorCode)
	if status == "" {
		return nil
	}
	e := &Error{}
	if c := sniff(m.Data); c != nil && c.Unmarshal(m.Data, e) == nil && e.Code != "" {
		return e
	}
	return newError(kindOf(status), "%s", m.Header.Get(headerErrorText)) // from a service that does not use aegis
}

// kindOf returns the sentinel for a status.
func kindOf(status string) *Error { return cmp.Or(sentinels[status], ErrInternal) }

// cut returns a copy of e that is small enough to be stored in the record of a command. It shortens Message to maxErrorText, and
// drops Details and Cause if the error is still larger than letterRoom.
func (e *Error) cut() *Error {
	out := *e
	out.Message = cutText(out.Message, maxErrorText)
	if data, err := MsgPack.Marshal(&out); err == nil && len(data) > letterRoom {
		out.Details, out.Cause = nil, nil
	}
	return &out
}

// cutText returns the first characters of text, at most so many bytes, with ? instead of what is not valid UTF-8.
func cutText(text string, most int) string {
	if len(text) > most {
		end := most
		for end > max(most-utf8.UTFMax, 0) && !utf8.RuneStart(text[end]) {
			end--
		}
		text = text[:end]
	}
	return strings.ToValidUTF8(text, "?")
}
