package aegis

import (
	"bytes"
	"cmp"
	"encoding"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/vmihailenco/msgpack/v5"
)

// This file decides which Go values MessagePack carries faithfully, and decodes MessagePack, which must not be trusted until it
// has been checked.

// A shape is what reflection says about a Go type: whether MessagePack carries its values, and how they are decoded.
type shape struct {
	typ    reflect.Type
	kind   reflect.Kind
	form   form
	json   bool   // whether values are sent as JSON, because msgpack v5 does not encode them as encoding/json does
	levels int    // how deep its values nest, as far as the type determines that
	walks  bool   // whether it contains an any or may contain itself, so that each value has to be examined
	key    *shape // of a map
	elem   *shape // of a map, slice, array, or pointer
	fields []field
	byName map[string]int // positions in fields

	building bool // whether newShape is still building it
}

// A form says how values of a type are decoded.
type form int

const (
	byKind    form = iota
	byJSON         // by encoding/json
	byBinary       // by the type's UnmarshalBinary
	timestamp      // a time.Time
)

// A field is a field of a struct. Fields of embedded structs belong to the outer struct, as in JSON.
type field struct {
	name  string
	index []int // for reflect.Value.FieldByIndex
	shape *shape
}

var shapes sync.Map // reflect.Type -> *shape

// shapeOf returns the shape of a type. Shapes are cached.
func shapeOf(t reflect.Type) *shape {
	s, ok := shapes.Load(t)
	if !ok {
		s, _ = shapes.LoadOrStore(t, newShape(t, map[reflect.Type]*shape{}))
	}
	return s.(*shape)
}

var (
	timeType = reflect.TypeFor[time.Time]()
	byteType = reflect.TypeFor[byte]()

	// ownFormats are the interfaces with which a type defines its own encoding. The first two are for binary data.
	ownFormats = []reflect.Type{
		reflect.TypeFor[encoding.BinaryMarshaler](), reflect.TypeFor[encoding.BinaryUnmarshaler](),
		reflect.TypeFor[json.Marshaler](), reflect.TypeFor[json.Unmarshaler](), reflect.TypeFor[encoding.TextMarshaler](),
		reflect.TypeFor[encoding.TextUnmarshaler](), reflect.TypeFor[msgpack.Marshaler](), reflect.TypeFor[msgpack.Unmarshaler](),
		reflect.TypeFor[msgpack.CustomEncoder](), reflect.TypeFor[msgpack.CustomDecoder](),
	}
)

// newShape returns the shape of a type. made has the shapes that were made so far: those of the types that contain t, and of
// other types that these contain.
func newShape(t reflect.Type, made map[reflect.Type]*shape) *shape {
	if s := made[t]; s != nil {
		s.walks = s.walks || s.building // because it may contain itself
		return s
	}
	s := &shape{typ: t, kind: t.Kind(), building: true}
	made[t] = s
	has := func(method reflect.Type) bool { return t.Implements(method) || reflect.PointerTo(t).Implements(method) }
	contain := func(t reflect.Type) *shape {
		inner := newShape(t, made)
		s.json, s.walks, s.levels = s.json || inner.json, s.walks || inner.walks, max(s.levels, inner.levels+1)
		return inner
	}
	switch {
	case t == timeType:
		s.form = timestamp
	case s.kind == reflect.Pointer:
		s.elem = contain(t.Elem())
	case s.kind == reflect.Struct && has(ownFormats[0]) && has(ownFormats[1]) && !slices.ContainsFunc(ownFormats[2:], has) &&
		!slices.ContainsFunc(reflect.VisibleFields(t), func(f reflect.StructField) bool { return f.Anonymous }):
		s.form = byBinary
		// This holds for the whole program, because msgpack v5 has one table of encoders.
		msgpack.Register(reflect.Zero(t).Interface(), packBinary, nil)
	case t == reflect.TypeFor[json.Number](), slices.ContainsFunc(ownFormats, has):
		s.form = byJSON
	case isScalar(s.kind):
	case s.kind == reflect.Interface && t.NumMethod() == 0:
		s.walks = true
	case s.kind == reflect.Slice || s.kind == reflect.Array:
		s.elem = contain(t.Elem())
		// msgpack v5 would encode bytes of a named type as binary data, too.
		s.json = s.json || s.elem.kind == reflect.Uint8 && s.elem.typ != byteType
	case s.kind == reflect.Map && isScalar(t.Key().Kind()):
		s.key, s.elem = contain(t.Key()), contain(t.Elem())
		s.form = s.key.form // byJSON if keys have methods
	case s.kind == reflect.Struct:
		s.addFields(contain)
	default:
		s.form = byJSON // encoding/json returns an error if it does not support the type
	}
	s.json = s.json || s.form == byJSON
	s.building = false
	return s
}

// packBinary encodes a value of the form byBinary. Unlike the encoder of msgpack v5, it can encode a value that is not
// addressable, and does not encode empty data as nil, which would become a nil pointer.
func packBinary(e *msgpack.Encoder, v reflect.Value) error {
	p := reflect.New(v.Type())
	p.Elem().Set(v)
	data, err := p.Interface().(encoding.BinaryMarshaler).MarshalBinary()
	if err != nil {
		return err
	}
	return e.EncodeBytes(append([]byte{}, data...))
}

func isScalar(k reflect.Kind) bool {
	return k >= reflect.Bool && k <= reflect.Uint64 || k == reflect.Float32 || k == reflect.Float64 || k == reflect.String
}

// addFields adds the fields of a struct. If msgpack v5 does not see the same fields as encoding/json, the form becomes byJSON.
func (s *shape) addFields(contain func(reflect.Type) *shape) {
	s.byName = map[string]int{}
	var names []string // that msgpack v5 sees
	for f := range s.typ.Fields() {
		tag, tagged := f.Tag.Lookup("json")
		name, option, _ := strings.Cut(tag, ",")
		_, own := f.Tag.Lookup("msgpack")
		if own || f.Name == "_msgpack" {
			s.form = byJSON
		}
		if tag == "-" || !f.IsExported() && !f.Anonymous {
			continue
		}
		inner := contain(f.Type)
		if f.Anonymous && (tagged || inner.building || inner.kind != reflect.Struct || inner.form != byKind) ||
			strings.ContainsFunc(name, isOdd) || name == "-" || option != "" && (option != "omitempty" || !inner.omitsAlike()) {
			s.form = byJSON
		}
		added := []field{{name: cmp.Or(name, f.Name), shape: inner}}
		if f.Anonymous {
			added = inner.fields
			names = append(names, f.Name) // msgpack v5 uses it for the embedded struct as a whole
		}
		for _, e := range added {
			names = append(names, e.name)
			s.byName[e.name] = len(s.fields)
			s.fields = append(s.fields, field{e.name, slices.Concat(f.Index, e.index), e.shape})
		}
	}
	slices.Sort(names)
	if len(slices.Compact(names)) < len(names) {
		s.form = byJSON
	}
}

// isOdd reports whether a rune in the name of a field may mean something else to msgpack v5.
func isOdd(r rune) bool {
	return !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("_-.", r)
}

// omitsAlike reports whether omitempty has the same effect in encoding/json and in msgpack v5.
func (s *shape) omitsAlike() bool {
	isZeroer := reflect.TypeFor[interface{ IsZero() bool }]()
	return s.kind != reflect.Struct && s.kind != reflect.Interface && !s.typ.Implements(isZeroer)
}

// needsJSON reports whether v has to be sent as JSON, because MessagePack does not carry it faithfully. depth is the number of
// values that v is nested in.
func needsJSON(v reflect.Value, depth int) bool {
	if !v.IsValid() { // nil
		return false
	}
	s := shapeOf(v.Type())
	return s.json || s.holdsJSON(v, depth)
}

// holdsJSON reports whether v contains an any whose value needs JSON, or is nested too deep. s is the shape of v.
func (s *shape) holdsJSON(v reflect.Value, depth int) bool {
	switch {
	case !s.walks && depth+s.levels <= maxDepth:
		return false
	case !s.walks || depth > maxDepth: // v may contain itself; then encoding/json returns an error
		return true
	case s.kind == reflect.Interface:
		return needsJSON(v.Elem(), depth)
	case s.kind == reflect.Pointer:
		return !v.IsNil() && s.elem.holdsJSON(v.Elem(), depth+1)
	case s.kind == reflect.Struct:
		return slices.ContainsFunc(s.fields, func(f field) bool { return f.shape.holdsJSON(v.FieldByIndex(f.index), depth+1) })
	case s.kind == reflect.Map:
		for m := v.MapRange(); m.Next(); {
			if s.elem.holdsJSON(m.Value(), depth+1) {
				return true
			}
		}
		return false
	}
	for i := range v.Len() { // of a slice or an array
		if s.elem.holdsJSON(v.Index(i), depth+1) {
			return true
		}
	}
	return false
}

// maxDepth bounds the nesting of MessagePack, because encoding and decoding recurse. Without a bound, a value that contains
// itself, or a payload with one byte per level, could overflow the stack.
const maxDepth = 128

var errShort = errors.New("the payload ends in the middle of a value")

// unpack decodes the first value of b into v, whose type has the shape s, and returns the bytes after the value. skip has
// checked b: it is well-formed and not nested too deep. unpack treats what v holds already as encoding/json does, but replaces
// what an any holds. The decoder of msgpack v5 is not used, because it does not check that a value fits its target, and takes
// longer.
func unpack(b []byte, v reflect.Value, s *shape) ([]byte, error) {
	var t token
	rest, _ := t.read(b) // can't fail, here and below, because skip has checked b
	switch {             // in this order: formats of a type's own, nil, kinds
	case s.form == timestamp && t.class == extension:
		at, err := t.time()
		v.Set(reflect.ValueOf(at))
		return rest, err
	case s.form == timestamp && t.class == classText, s.form == byJSON && t.class != binaryData,
		t.class == classText && s.kind == reflect.Slice && s.elem.kind == reflect.Uint8: // base64
		return unpackByJSON(b, v)
	case s.form == byJSON, s.form == byBinary && t.class == binaryData:
		return rest, t.unmarshal(v)
	case t.class == classNull:
		if s.kind == reflect.Pointer || s.kind == reflect.Interface || s.kind == reflect.Map || s.kind == reflect.Slice {
			v.SetZero()
		}
	case s.kind == reflect.Pointer:
		if v.IsNil() {
			v.Set(reflect.New(s.elem.typ))
		}
		return unpack(b, v.Elem(), s.elem)
	case s.kind == reflect.Interface:
		value := reflect.New(t.anyType(s.typ)).Elem()
		rest, err := unpack(b, value, shapeOf(value.Type()))
		if at, ok := value.Interface().(time.Time); ok && s.typ == reflect.TypeFor[jsonAny]() {
			value.Set(reflect.ValueOf(at.UTC())) // JSON has no seconds in the offset of a zone
		}
		v.Set(value)
		return rest, err
	case t.class == mapping && s.kind == reflect.Struct && s.form == byKind:
		return unpackStruct(rest, v, s, int(t.n))
	case t.class == mapping && s.kind == reflect.Map:
		return unpackMap(rest, v, s, int(t.n))
	case t.class == array && s.kind == reflect.Slice, t.class == array && s.kind == reflect.Array && int(t.n) == v.Len():
		return unpackList(rest, v, s, int(t.n))
	case t.class == binaryData && s.kind == reflect.Slice && s.elem.kind == reflect.Uint8:
		v.SetBytes(bytes.Clone(t.body))
	case t.class == binaryData && s.kind == reflect.Array && s.elem.typ == byteType && len(t.body) == v.Len():
		reflect.Copy(v, reflect.ValueOf(t.body))
	case !t.setScalar(v):
		return nil, fmt.Errorf("%s does not fit %v", t.String(), s.typ)
	}
	return rest, nil
}

// unpackStruct decodes n fields of a struct.
func unpackStruct(b []byte, v reflect.Value, s *shape, n int) (_ []byte, err error) {
	for next := 0; n > 0; n-- { // next is the position of the field that is expected, because most senders have the same type
		var name token
		if b, _ = name.read(b); !name.makeText() {
			return nil, fmt.Errorf("%s is the name of a field: want a string", name.String())
		}
		i, ok := next, next < len(s.fields) && s.fields[next].name == string(name.body)
		if !ok {
			i, ok = s.byName[string(name.body)]
		}
		if !ok { // encoding/json takes a name in another case, too
			i = slices.IndexFunc(s.fields, func(f field) bool { return strings.EqualFold(f.name, string(name.body)) })
		}
		if i < 0 {
			b, _ = skip(b, 0)
			continue
		}
		f := &s.fields[i]
		next = i + 1
		if b, err = unpack(b, v.FieldByIndex(f.index), f.shape); err != nil {
			return nil, fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return b, nil
}

// unpackMap decodes n entries of a map.
func unpackMap(b []byte, v reflect.Value, s *shape, n int) (_ []byte, err error) {
	isNew := v.Len() == 0
	if v.IsNil() {
		v.Set(reflect.MakeMapWithSize(s.typ, n))
	}
	for range n {
		var t token
		b, _ = t.read(b)
		key, elem := reflect.New(s.key.typ).Elem(), reflect.New(s.elem.typ).Elem()
		if s.key.kind == reflect.String {
			t.makeText()
		} else if n, err := strconv.ParseInt(string(t.body), 10, 64); err == nil && t.class == classText {
			t = token{class: integer, n: uint64(n), negative: n < 0}
		}
		if !t.setScalar(key) {
			return nil, fmt.Errorf("a key of the map, %s, does not fit %v", t.String(), s.key.typ)
		}
		if b, err = unpack(b, elem, s.elem); err != nil {
			return nil, fmt.Errorf("[%s]: %w", t.String(), err)
		}
		v.SetMapIndex(key, elem)
	}
	if isNew && v.Len() < n {
		return nil, fmt.Errorf("two keys of a %v are equal", s.typ)
	}
	return b, nil
}

// unpackList decodes the n elements of a slice or an array.
func unpackList(b []byte, v reflect.Value, s *shape, n int) (_ []byte, err error) {
	if s.kind == reflect.Slice {
		if v.IsNil() {
			v.Set(reflect.MakeSlice(s.typ, n, n))
		}
		v.Grow(max(n-v.Len(), 0))
		v.SetLen(n)
	}
	for i := range n {
		if b, err = unpack(b, v.Index(i), s.elem); err != nil {
			return nil, fmt.Errorf("[%d]: %w", i, err)
		}
	}
	return b, nil
}

// unpackByJSON decodes the first value of b into v by way of JSON, in which binary data is base64, and returns the bytes after
// it. It fails if JSON can't express the value.
func unpackByJSON(b []byte, v reflect.Value) ([]byte, error) {
	var value jsonAny
	rest, err := unpack(b, reflect.ValueOf(&value).Elem(), shapeOf(reflect.TypeFor[jsonAny]()))
	if err != nil {
		return nil, err
	}
	data, err := json.Marshal(value)
	switch {
	case err != nil:
		return nil, err
	case bytes.Contains(bytes.ReplaceAll(data, []byte(`\\`), nil), []byte(`\ufffd`)): // encoding/json has replaced invalid UTF-8
		return nil, errors.New("a string that has to be converted to JSON is not valid UTF-8")
	}
	return rest, json.Unmarshal(data, v.Addr().Interface())
}

// skip returns the bytes after the first value of b, which is nested in depth values. It fails if that is malformed or nested too
// deep, and does not allocate. Without that check, a few bytes that announce a long array could make unpack allocate millions of
// elements.
func skip(b []byte, depth int) ([]byte, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("nested deeper than %d levels", maxDepth)
	}
	var t token
	b, err := t.read(b)
	for n := t.nested(); n > 0 && err == nil; n-- {
		b, err = skip(b, depth+1)
	}
	return b, err
}

// A class is a kind of value in MessagePack.
type class uint8

const (
	unused class = iota
	classNull
	boolean
	integer
	float
	classText
	binaryData
	array
	mapping
	extension
)

var classNames = [...]string{classNull: "nil", boolean: "a bool", binaryData: "binary data", array: "an array",
	mapping: "a map", extension: "a timestamp or another extension"}

// A token is the beginning of a value in MessagePack, up to the first value that is nested in it.
type token struct {
	class    class
	size     uint8  // of a number, in bytes
	negative bool   // whether an integer is negative
	n        uint64 // a number's bits, 1 for true, the number of elements or entries, or the length of body
	body     []byte // of a string or binary data; of an extension with its type in the first byte
}

// read makes t the first token of b, and returns the bytes after it. It checks that b has room for what the token announces. The
// format is described in https://github.com/msgpack/msgpack/blob/master/spec.md
func (t *token) read(b []byte) ([]byte, error) {
	if len(b) == 0 || len(b) <= int(formats[b[0]].size) {
		return nil, errShort
	}
	f := &formats[b[0]]
	*t = token{class: f.class, size: f.size, negative: f.n < 0, n: uint64(f.n)}
	if f.size > 0 {
		var word [8]byte
		copy(word[8-f.size:], b[1:])
		t.n = binary.BigEndian.Uint64(word[:])
	}
	if f.signed && b[1] >= 0x80 {
		t.negative, t.n = true, t.n|math.MaxUint64<<(8*f.size) // extends the sign
	}
	b = b[1+f.size:]
	switch t.class {
	case unused:
		return nil, errors.New("the byte 0xc1 is not valid")
	case extension:
		t.n++
		fallthrough
	case classText, binaryData:
		if t.n > uint64(len(b)) {
			return nil, errShort
		}
		t.body, b = b[:t.n], b[t.n:]
	case array, mapping:
		if t.nested() > uint64(len(b)) {
			return nil, errShort
		}
	}
	return b, nil
}

// A format describes the values that begin with a certain byte: their class, the number of bytes that hold n, and n if there are
// none.
type format struct {
	class  class
	size   uint8
	n      int8
	signed bool
}

var formats = func() (f [256]format) {
	for c := range f {
		switch {
		case c < 0x80 || c >= 0xe0:
			f[c] = format{class: integer, n: int8(c)}
		case c < 0x90:
			f[c] = format{class: mapping, n: int8(c & 0x0f)}
		case c < 0xa0:
			f[c] = format{class: array, n: int8(c & 0x0f)}
		case c < 0xc0:
			f[c] = format{class: classText, n: int8(c & 0x1f)}
		}
	}
	copy(f[0xc0:], []format{
		{class: classNull}, {}, {class: boolean}, {class: boolean, n: 1}, {binaryData, 1, 0, false}, {binaryData, 2, 0, false},
		{binaryData, 4, 0, false}, {extension, 1, 0, false}, {extension, 2, 0, false}, {extension, 4, 0, false},
		{float, 4, 0, false}, {float, 8, 0, false}, {integer, 1, 0, false}, {integer, 2, 0, false}, {integer, 4, 0, false},
		{integer, 8, 0, false}, {integer, 1, 0, true}, {integer, 2, 0, true}, {integer, 4, 0, true}, {integer, 8, 0, true},
		{extension, 0, 1, false}, {extension, 0, 2, false}, {extension, 0, 4, false}, {extension, 0, 8, false},
		{extension, 0, 16, false}, {classText, 1, 0, false}, {classText, 2, 0, false}, {classText, 4, 0, false}, {array, 2, 0, false},
		{array, 4, 0, false}, {mapping, 2, 0, false}, {mapping, 4, 0, false},
	})
	return f
}()

// nested returns how many values are nested in the value.
func (t *token) nested() uint64 { return t.n * nestedPerElement[t.class] }

var nestedPerElement = [...]uint64{array: 1, mapping: 2, extension: 0}

// digits returns the number in decimal.
func (t *token) digits() string {
	switch {
	case t.class == float:
		return strconv.FormatFloat(t.float(), 'g', -1, 64)
	case t.negative:
		return strconv.FormatInt(int64(t.n), 10)
	}
	return strconv.FormatUint(t.n, 10)
}

// String describes the value, for an error message.
func (t *token) String() string {
	switch t.class {
	case integer, float:
		return "the number " + t.digits()
	case classText:
		return fmt.Sprintf("the string %.64q", t.body)
	}
	return classNames[t.class]
}

// float returns the number, of class float.
func (t *token) float() float64 {
	if t.size == 4 {
		return float64(math.Float32frombits(uint32(t.n)))
	}
	return math.Float64frombits(t.n)
}

// A jsonAny is an any with a value that is on its way to JSON. In it, a float32 remains one, because JSON writes it with fewer
// digits than the float64 of the same value.
type jsonAny any

// anyType returns the type that the value has in an any, or in a jsonAny if that is what in is.
func (t *token) anyType(in reflect.Type) reflect.Type {
	forJSON := in == reflect.TypeFor[jsonAny]()
	switch {
	case t.class == integer && !t.negative && t.n > math.MaxInt64:
		return reflect.TypeFor[uint64]()
	case forJSON && t.class == float && t.size == 4:
		return reflect.TypeFor[float32]()
	case forJSON && t.class == array:
		return reflect.TypeFor[[]jsonAny]()
	case forJSON && t.class == mapping:
		return reflect.TypeFor[map[string]jsonAny]()
	}
	return anyTypes[t.class]
}

var anyTypes = [...]reflect.Type{
	boolean: reflect.TypeFor[bool](), integer: reflect.TypeFor[int64](), float: reflect.TypeFor[float64](),
	classText: reflect.TypeFor[string](), binaryData: reflect.TypeFor[[]byte](), array: reflect.TypeFor[[]any](),
	mapping: reflect.TypeFor[map[string]any](), extension: timeType,
}

// time returns the instant of a timestamp.
func (t *token) time() (at time.Time, err error) {
	data, seconds, nanoseconds := t.body[1:], int64(0), int64(-1)
	switch len(data) {
	case 4:
		seconds, nanoseconds = int64(binary.BigEndian.Uint32(data)), 0
	case 8:
		n := binary.BigEndian.Uint64(data)
		seconds, nanoseconds = int64(n&(1<<34-1)), int64(n>>34)
	case 12:
		seconds, nanoseconds = int64(binary.BigEndian.Uint64(data[4:])), int64(binary.BigEndian.Uint32(data))
	}
	if int8(t.body[0]) != -1 || nanoseconds < 0 || nanoseconds >= 1e9 {
		return at, fmt.Errorf("the extension %#x of type %d is not a timestamp", data[:min(len(data), 16)], int8(t.body[0]))
	}
	if at = time.Unix(seconds, nanoseconds); at.IsZero() {
		at = time.Time{} // without a zone
	}
	return at, nil
}

// makeText turns an integer that is the key of a map into the text that JSON has for it. It reports whether t is text afterwards.
func (t *token) makeText() bool {
	if t.class == integer {
		t.class, t.body = classText, []byte(t.digits())
	}
	return t.class == classText
}

// unmarshal passes binary data to the UnmarshalBinary of v, or else to its UnmarshalText. Version 0.1 encoded every type with
// these methods as binary data, and streams may still contain its payloads.
func (t *token) unmarshal(v reflect.Value) error {
	switch u := v.Addr().Interface().(type) {
	case encoding.BinaryUnmarshaler:
		return u.UnmarshalBinary(bytes.Clone(t.body))
	case encoding.TextUnmarshaler:
		return u.UnmarshalText(bytes.Clone(t.body))
	}
	return fmt.Errorf("%s does not fit %v", t.String(), v.Type())
}

// setScalar sets v to a bool, a number or a string. It reports whether the value fits, by the rules of encoding/json.
func (t *token) setScalar(v reflect.Value) bool {
	switch {
	case t.class == boolean && v.Kind() == reflect.Bool:
		v.SetBool(t.n == 1)
	case t.class == classText && v.Kind() == reflect.String:
		v.SetString(string(t.body))
	case t.class == float && v.CanFloat() && int(t.size)*8 <= v.Type().Bits():
		v.SetFloat(t.float())
	case (t.class == float || t.class == integer) && v.CanFloat():
		f, err := strconv.ParseFloat(t.digits(), v.Type().Bits()) // rounds as encoding/json does
		if err != nil {
			return false
		}
		v.SetFloat(f)
	case t.class == integer && v.CanInt() && (t.negative || t.n <= math.MaxInt64) && !v.OverflowInt(int64(t.n)):
		v.SetInt(int64(t.n))
	case t.class == integer && v.CanUint() && !t.negative && !v.OverflowUint(t.n):
		v.SetUint(t.n)
	default:
		return false
	}
	return true
}
